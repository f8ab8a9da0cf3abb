"""The demo's dialogues: instructions and questions made from the exact facts of `llm2clip data demo`."""
