from .page import write_report as write_report
from .page import Section as Section
from .comparisons import comparison_section as comparison_section
from .trust import trust_section as trust_section
from .trust import reliability_section as reliability_section
from .trust import slopes_section as slopes_section
from .trust import calibration_section as calibration_section
from .trust import side_effects_section as side_effects_section
