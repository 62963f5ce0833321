from .files import ContrastFileError as ContrastFileError
from .files import bundled_names as bundled_names
from .pair import ContrastPair as ContrastPair
from .pair import FieldError as FieldError
from .sets import ContrastSet as ContrastSet
from .sets import LetterBalanceWarning as LetterBalanceWarning
from .sets import load_open_ended as load_open_ended
