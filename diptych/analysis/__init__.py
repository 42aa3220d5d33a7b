"""Probes of a model: separability of features, attention to pictures and to words, what reading and drawing share.

No family depends on them. ``collect`` observes blocks, parts and attention calls through hooks and changes nothing.
"""
