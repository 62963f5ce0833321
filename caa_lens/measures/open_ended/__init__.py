"""Open-ended answers: measures that need no judge, and a judge with its rubrics and its log."""
