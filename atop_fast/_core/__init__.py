"""What every part of the package stands on: checks of arguments, files, flags, memory, precision, processes."""
