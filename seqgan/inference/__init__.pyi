"""Public names, one import each: the package loads them from here when they are first used."""

from .files import SampleRequest as SampleRequest
from .files import complete_picture as complete_picture
from .files import hidden_pixels as hidden_pixels
from .files import image_side as image_side
from .files import predict_picture as predict_picture
from .files import read_request as read_request
from .files import reconstruct_picture as reconstruct_picture
from .files import reconstructions as reconstructions
from .files import samples as samples
from .files import square as square
from .files import tokenizer_of as tokenizer_of
