"""How answers are judged: `matching` holds the definitions, `tool_call` offers them to `evaluate.load`."""
