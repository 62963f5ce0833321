from .questions import load_paper_set as load_paper_set
from .questions import load_paper_questions as load_paper_questions
from .numbers import published as published
