"""From published data sets, folders and archives to packed sets."""

from scalelong_fast.data.prepare.options import PrepareOptions, Request
from scalelong_fast.data.prepare.recipes import RECIPES, Recipe
from scalelong_fast.data.prepare.run import prepare

__all__ = ["RECIPES", "PrepareOptions", "Recipe", "Request", "prepare"]
