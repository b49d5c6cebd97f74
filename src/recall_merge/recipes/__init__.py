"""Recipes: the procedures behind the commands, each reading top to bottom as what it does."""
