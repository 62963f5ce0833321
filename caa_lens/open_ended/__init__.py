"""Open-ended answers: measures that need no judge, and a judge behind an OpenAI-compatible endpoint."""
