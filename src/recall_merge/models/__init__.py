"""Models at work: text in, hidden states, training and scores out. Nothing here knows of recipes or commands."""
