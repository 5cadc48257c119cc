"""The platforms. A bot is a class with serve, send and typing (see base); console is the one to copy."""
