"""How the families are trained, exported and measured: recipes above `training` and `evaluation`,
of the networks and systems in `models`. A family's `FamilySpec` names them."""
