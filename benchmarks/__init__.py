"""What merging costs, measured beside another tool or the limit of the machine: `make bench`, or python -m benchmarks --help."""
