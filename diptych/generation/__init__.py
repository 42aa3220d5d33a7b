"""From messages to events: answers token by token, pictures step by step."""
