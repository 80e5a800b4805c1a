"""From rows of text to the batch of a step."""
