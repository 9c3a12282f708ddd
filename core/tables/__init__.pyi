"""Public names, one import each: the package loads them from here when they are first used."""

from .claim_file import load_claim as load_claim
from .runs import Result as Result
from .runs import Results as Results
from .table import find_tables as find_tables
from .table import list_tables as list_tables
from .table import show_table as show_table
from .table import side_by_side as side_by_side
from .table_file import load_table as load_table
