"""A server of one model with OpenAI's protocol: requests, the thread that decodes, the application."""
