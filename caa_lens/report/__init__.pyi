from .page import write_report as write_report
from .page import Section as Section
from .comparisons import comparison_section as comparison_section
