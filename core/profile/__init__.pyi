"""Public names, one import each: the package loads them from here when they are first used."""

from .experiment import loader_rate as loader_rate
from .experiment import profile_experiment as profile_experiment
from .measure import benchmark as benchmark
from .measure import count_macs as count_macs
from .measure import count_parameters as count_parameters
from .measure import device_name as device_name
from .measure import peak_memory as peak_memory
from .measure import synchronize as synchronize
from .measure import where_time_goes as where_time_goes
