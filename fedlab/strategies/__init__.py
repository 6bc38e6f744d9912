"""How a server selects its cohort, combines updates and moves the model, and what that changes at the sites.

Read `averaging` first: it has the mean, and `FedAvg`, from which every strategy inherits. `client_drift` corrects
training at the sites, `server_optimisers` steps with the mean, `robust` withstands faulty and malicious sites.
Asynchronous aggregation is `topologies.Buffered`. FedBN (Li et al. 2021) is
`privacy.PersonalLayers(names=norms(model))`, with batch norm and `SiteTrainer(buffers="keep")`: which layers leave a
site is a question of privacy. May import `training` and `core`.

Example:
    >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
    >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
    >>> fl.federate(trainer, sites, strategy=fl.strategies.FedProx(mu=0.01), rounds=1)
    <History: 1 of 1 round, loss ...; no formal guarantee>
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
