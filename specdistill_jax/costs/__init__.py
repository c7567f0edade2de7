"""What a program costs on chips that are not here: memory, FLOPs, bytes, collectives, time."""
