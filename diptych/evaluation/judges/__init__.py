"""What judges an answer or a picture: rules, small networks and language models."""
