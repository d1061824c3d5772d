//! The cluster that a node belongs to: how it comes into being (`formation`), who belongs to it (`membership`) and who no more
//! (`expulsion`), who leads (`hand_over`, `leadership`, `preference`), and what of their machine all members read (`versions`).

pub(super) mod expulsion;
pub(super) mod formation;
pub(super) mod hand_over;
pub(super) mod leadership;
pub(super) mod membership;
mod preference;
pub(super) mod versions;
