"""A model that learns one task after another: state, validation, stages, rollback, status."""
