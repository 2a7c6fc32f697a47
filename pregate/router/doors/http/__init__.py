"""The rooms of the HTTP door: bodies, answers, errors, guards; `openai_app.py` puts them together."""
