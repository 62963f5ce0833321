from .fetch import fetch as fetch
from .numbers import published as published
from .questions import load_paper_questions as load_paper_questions
from .questions import load_paper_set as load_paper_set
