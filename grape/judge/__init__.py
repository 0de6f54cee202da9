"""LLM judges: their files, prompts, replies, clients, and the critic that puts them to work."""
