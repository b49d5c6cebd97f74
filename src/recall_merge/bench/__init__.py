"""The bench: tasks x orders x seeds x methods, in jobs that are known by all that they depend on, so that nothing is done twice."""
