"""Shared infrastructure: argument checks, files, temporary flags, memory, precision, threads and processes."""
