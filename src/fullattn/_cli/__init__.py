"""What the commands share: the parser, types of arguments, errors, output folders."""
