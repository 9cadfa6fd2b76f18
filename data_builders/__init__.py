"""Builders of what training needs: the demo corpus, subset plans and labels."""
