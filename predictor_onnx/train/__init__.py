"""How the predictor's model and its catalog of named models are made; needs the ``train`` extra."""
