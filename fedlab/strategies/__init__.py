"""How a server selects its cohort, combines updates and moves the model, and what that changes at the sites.

Read `averaging` first: it has the mean, and `FedAvg`, from which every strategy inherits. `client_drift` corrects
training at the sites, `server_optimisers` steps with the mean, `robust` withstands faulty and malicious sites.
Asynchronous aggregation is `topologies.Buffered`. FedBN (Li et al. 2021) is
`privacy.PersonalLayers(names=norms(model))`, with batch norm and `SiteTrainer(buffers="keep")`: which layers leave a
site is a question of privacy. May import `training` and `core`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
