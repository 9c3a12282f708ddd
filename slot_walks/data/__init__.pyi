"""Public names, one import each: the package loads them from here when they are first used."""

from .birds import Birds as Birds
from .coco import COCO as COCO
from .cocostuff import COCOSTUFF27 as COCOSTUFF27
from .cocostuff import COCOStuff as COCOStuff
from .dogs_cars import Cars as Cars
from .dogs_cars import Dogs as Dogs
from .flowers import Flowers as Flowers
from .movi import MOVi as MOVi
from .transforms import CropTrain as CropTrain
from .transforms import OfficialEval as OfficialEval
from .transforms import Square as Square
from .transforms import StandardEval as StandardEval
from .transforms import WholePicture as WholePicture
from .voc import VOC as VOC
from .voc import VOC_CLASSES as VOC_CLASSES
