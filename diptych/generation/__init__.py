"""From messages to events: answers word by word, pictures step by step."""
