"""The run-time check of the mathematics' annotations: jaxtyping's shapes, by beartype."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for type checkers
