"""Pure tensor mathematics; not for anything that needs a model, a file or text."""
