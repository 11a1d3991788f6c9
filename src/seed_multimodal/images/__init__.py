"""Images: reading with limits (`io`), transforms of vision encoders (`transforms`), the random
transform of training (`augment`), views of any resolution (`views`), contact sheets (`sheet`).
Imports no other subpackage.
"""
