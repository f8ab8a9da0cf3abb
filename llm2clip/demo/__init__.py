"""The demo's data and pretrained weights, made from ordinary packages; the rest of llm2clip does not import it."""
