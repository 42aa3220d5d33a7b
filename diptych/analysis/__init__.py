"""What happens inside a model: separability of features, attention to pictures, attention to words while drawing.

Nothing here enters a family. ``collect`` watches blocks, parts and attention calls from outside and leaves no trace.
"""
