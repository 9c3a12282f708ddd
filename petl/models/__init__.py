"""The methods as plain modules in any backbone of timm: nothing here knows the engine, configs or data."""

from petl.models.channels import ChannelTuning, select_channels
from petl.models.importance import Scores, ZeroScores, all_channel_scores, channel_scores, salience
from petl.models.inject import PetlModel, delta_parameters, describe, inject, parameter_table, trainable_parameters
from petl.models.merge import MergeReport, merge
from petl.models.methods import METHODS
from petl.models.sites import Backbone, NoSite

__all__ = [
    "METHODS",
    "Backbone",
    "ChannelTuning",
    "MergeReport",
    "NoSite",
    "PetlModel",
    "Scores",
    "ZeroScores",
    "all_channel_scores",
    "channel_scores",
    "delta_parameters",
    "describe",
    "inject",
    "merge",
    "parameter_table",
    "salience",
    "select_channels",
    "trainable_parameters",
]
