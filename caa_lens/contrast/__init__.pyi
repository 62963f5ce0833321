from .pair import ContrastPair as ContrastPair
from .sets import ContrastSet as ContrastSet
from .sets import load_open_ended as load_open_ended
from .files import bundled_names as bundled_names
from .sets import LetterBalanceWarning as LetterBalanceWarning
from .errors import DroppedRowsWarning as DroppedRowsWarning
from .errors import ContrastFileError as ContrastFileError
from .errors import FieldError as FieldError
