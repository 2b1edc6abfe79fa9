"""An OpenAI-compatible server for questions about long videos; see ``docs/design/serving.md``."""
