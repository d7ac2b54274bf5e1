"""The command line, with one thin module for each command."""
