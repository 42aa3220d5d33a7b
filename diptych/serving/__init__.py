"""A model behind HTTP: OpenAI's endpoints, and a page for people that uses nothing else.

``app.py`` the endpoints · ``schemas.py`` what they take · ``worker.py`` the running batch under asyncio · ``guard.py``
keys, limits and headers before anything is parsed · ``pictures.py`` pictures in and out · ``runs.py`` training runs.
"""
