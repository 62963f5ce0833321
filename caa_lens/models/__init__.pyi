from .loading.load import load_model as load_model
from .loading.load import n_parameters as n_parameters
from .loading.quantisation import weight_bytes as weight_bytes
from .loading.fingerprint import model_fingerprint as model_fingerprint
from .cpu_threads import CpuThreadsWarning as CpuThreadsWarning
from .checks import check_model as check_model
from .unembedding import final_logits as final_logits
