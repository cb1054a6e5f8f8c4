"""The commands of the command line that are longer than a page, one file each. cli.py puts them together."""
