//! Which node answers a read, when more than one may.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::endpoint::Endpoint;

/// Which node is asked first when any node may answer. If it fails, others are.
///
/// A [`Client`](super::Client) keeps the picture of the nodes up to date and asks the preference for every read;
/// [`choose`](Self::choose) can be used without one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ReadPreference {
    /// The leader, while one is known.
    Leader,
    /// Whichever node has less to do: of the next two in turn, the one with fewer requests in flight from this client.
    #[default]
    Any,
    /// All nodes in turn.
    RoundRobin,
    /// The node with the shortest round trip, as health probes measure it.
    Nearest,
    /// Each node as often as its weight says, compared with the sum of all. A node without one is asked only when
    /// no node with one is healthy.
    Weighted(Arc<BTreeMap<Endpoint, u32>>),
}

/// What is known of a node that could be asked.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Candidate<'a> {
    /// Where it is reached.
    pub endpoint: &'a Endpoint,
    /// Whether it is believed to lead.
    pub leads: bool,
    /// Whether it can be reached and says that it is ready. Others are asked only when there is no other.
    pub healthy: bool,
    /// Requests that it has been sent and has not answered.
    pub in_flight: usize,
    /// How long it takes to answer a small question, if that was measured.
    pub round_trip: Option<Duration>,
}

impl ReadPreference {
    /// Weights by endpoint.
    pub fn weighted(weights: impl IntoIterator<Item = (Endpoint, u32)>) -> Self {
        Self::Weighted(Arc::new(weights.into_iter().collect()))
    }

    /// The index of the candidate to ask; `None` only when there is none. `turn` counts the calls: with equal
    /// candidates, successive turns give what the preference promises over time.
    pub fn choose(&self, candidates: &[Candidate<'_>], turn: u64) -> Option<usize> {
        let any_healthy = candidates.iter().any(|candidate| candidate.healthy);
        let eligible = |at: &usize| candidates[*at].healthy || !any_healthy;
        let count = candidates.len();
        if count == 0 {
            return None;
        }
        let first = usize::try_from(turn % count as u64).expect("invariant: less than a length");
        let mut in_turn = (0..count).map(|step| (first + step) % count).filter(eligible);
        match self {
            Self::Leader => in_turn.clone().find(|at| candidates[*at].leads).or_else(|| in_turn.next()),
            Self::RoundRobin => in_turn.next(),
            Self::Any => in_turn.take(2).min_by_key(|at| candidates[*at].in_flight),
            Self::Nearest => in_turn.min_by_key(|at| candidates[*at].round_trip.unwrap_or(Duration::MAX)),
            Self::Weighted(weights) => {
                let weight = |at: usize| weights.get(candidates[at].endpoint).map_or(0, |w| u64::from(*w));
                let total: u64 = (0..count).filter(eligible).map(weight).sum();
                if total == 0 {
                    return in_turn.next();
                }
                let mut mark = spread(turn, total);
                (0..count).filter(eligible).find(|at| match mark.checked_sub(weight(*at)) {
                    Some(rest) => {
                        mark = rest;
                        false
                    }
                    None => true,
                })
            }
        }
    }
}

/// A number below `total`, such that any run of successive turns is spread evenly: multiples of the golden
/// ratio modulo one.
fn spread(turn: u64, total: u64) -> u64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let fraction = u128::from(turn.wrapping_mul(GOLDEN));
    u64::try_from((fraction * u128::from(total)) >> 64).expect("invariant: less than total")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(count: usize) -> Vec<Endpoint> {
        (1..=count).map(|n| Endpoint::parse(&format!("n{n}:1")).unwrap()).collect()
    }

    fn candidates(endpoints: &[Endpoint]) -> Vec<Candidate<'_>> {
        let candidate = |(at, endpoint)| Candidate {
            endpoint,
            leads: at == 1,
            healthy: true,
            in_flight: 0,
            round_trip: Some(Duration::from_millis(10 - at as u64)),
        };
        endpoints.iter().enumerate().map(candidate).collect()
    }

    /// How often each candidate is chosen in 600 turns.
    fn tally(preference: &ReadPreference, candidates: &[Candidate<'_>]) -> Vec<u32> {
        let mut tally = vec![0; candidates.len()];
        for turn in 0..600 {
            tally[preference.choose(candidates, turn).unwrap()] += 1;
        }
        tally
    }

    #[test]
    fn each_preference_chooses_as_it_says() {
        let endpoints = endpoints(3);
        let all = candidates(&endpoints);
        let weights = ReadPreference::weighted([(endpoints[0].clone(), 1), (endpoints[2].clone(), 3)]);
        for (preference, expected) in [
            (ReadPreference::Leader, [0, 600, 0]),
            (ReadPreference::Any, [200, 200, 200]),
            (ReadPreference::RoundRobin, [200, 200, 200]),
            (ReadPreference::Nearest, [0, 0, 600]),
            (weights, [150, 0, 450]),
        ] {
            let tally = tally(&preference, &all);
            let near = tally.iter().zip(expected).all(|(count, expected)| count.abs_diff(expected) <= 2);
            assert!(near, "{preference:?}: {tally:?}");
        }
    }

    #[test]
    fn the_unhealthy_are_passed_over_while_any_other_is_left() {
        let endpoints = endpoints(3);
        let mut some = candidates(&endpoints);
        some[1].healthy = false;
        some[2].healthy = false;
        let weights = ReadPreference::weighted([(endpoints[2].clone(), 3)]);
        for preference in [
            ReadPreference::Leader,
            ReadPreference::Any,
            ReadPreference::RoundRobin,
            ReadPreference::Nearest,
            weights,
        ] {
            assert_eq!(tally(&preference, &some), [600, 0, 0], "{preference:?}");
        }
        some[0].healthy = false;
        assert_eq!(tally(&ReadPreference::RoundRobin, &some), [200, 200, 200], "better than none");
        assert_eq!(ReadPreference::Any.choose(&[], 7), None);
    }

    #[test]
    fn the_busy_node_is_spared() {
        let endpoints = endpoints(2);
        let mut some = candidates(&endpoints);
        some[0].in_flight = 5;
        assert_eq!(tally(&ReadPreference::Any, &some), [0, 600]);
    }
}
