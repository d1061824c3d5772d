//! The report on the wire, in both directions. Text there, where this program has none, is empty.

use std::time::Duration;

use super::{
    FeedReport, MemberList, MemberReport, NodeReport, Offsets, ReplicaReport, SessionsReport, StateSize,
};
use crate::call::{decode_leader, decode_position, encode_leader, encode_position};
use crate::proto::v1;
use crate::types::{DiskState, DiskStatus, HistoryEpoch, Incarnation, LogId, QuotaSource, Role};

fn given(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl NodeReport {
    /// As it is told.
    pub(crate) fn encode(self) -> v1::StatusResponse {
        let report = self;
        let position = |at: Option<LogId>| at.map(|at| encode_position(at, report.history));
        let Offsets { last_log, committed, applied, snapshot, purged } = report.offsets;
        let room = report.disk.unwrap_or_default();
        v1::StatusResponse {
            disk_available_bytes: room.available_bytes,
            disk_reserve_bytes: room.reserve_bytes,
            disk_needed_bytes: room.needed_bytes,
            cluster: report.cluster,
            node_id: report.node_id,
            endpoint: report.client,
            role: report.role.map(|role| role.name().to_owned()).unwrap_or_default(),
            term: report.term,
            ready: report.ready,
            disk: report
                .disk
                .map(|disk| disk.state.name().to_owned())
                .or(report.unknown_disk)
                .unwrap_or_default(),
            fatal: report.fatal.unwrap_or_default(),
            diverged: report.diverged.unwrap_or_default(),
            leader: report.leader.map(encode_leader),
            last_log,
            committed: position(committed),
            applied: position(applied),
            state_hash: report.state_hash,
            snapshot: position(snapshot),
            purged: position(purged),
            version: report.version,
            members: report.members.into_iter().map(MemberReport::encode).collect(),
            feed: report.feed.map(FeedReport::encode),
            sessions: report.sessions.open,
            session_bytes: report.sessions.bytes,
            state_bytes: report.state.bytes,
            state_quota_bytes: report.state.quota_bytes,
            state_quota_set: report.state.quota_source == Some(QuotaSource::Operator),
            replicas: report.replicas.into_iter().map(ReplicaReport::encode).collect(),
            replica: report.replica.map(ReplicaReport::encode),
        }
    }

    /// What another node has told.
    pub(crate) fn decode(status: v1::StatusResponse) -> Self {
        let history = status.applied.or(status.committed).map_or(0, |position| position.history);
        let position = |position: Option<v1::Position>| position.map(decode_position);
        let disk = DiskState::from_name(&status.disk).map(|state| DiskStatus {
            state,
            available_bytes: status.disk_available_bytes,
            reserve_bytes: status.disk_reserve_bytes,
            needed_bytes: status.disk_needed_bytes,
            ..Default::default()
        });
        let quota_source = if status.state_quota_set { QuotaSource::Operator } else { QuotaSource::Memory };
        Self {
            cluster: status.cluster,
            node_id: status.node_id,
            client: status.endpoint,
            role: Role::from_name(&status.role),
            term: status.term,
            ready: status.ready,
            disk,
            unknown_disk: given(status.disk).filter(|_| disk.is_none()),
            fatal: given(status.fatal),
            diverged: given(status.diverged),
            leader: status.leader.map(decode_leader),
            offsets: Offsets {
                last_log: status.last_log,
                committed: position(status.committed),
                applied: position(status.applied),
                snapshot: position(status.snapshot),
                purged: position(status.purged),
            },
            state_hash: status.state_hash,
            version: status.version,
            members: status.members.into_iter().map(MemberReport::decode).collect(),
            feed: status.feed.map(FeedReport::decode),
            sessions: SessionsReport {
                open: status.sessions,
                bytes: status.session_bytes,
                ..Default::default()
            },
            state: StateSize {
                bytes: status.state_bytes,
                quota_bytes: status.state_quota_bytes,
                quota_source: status.state_quota_bytes.map(|_| quota_source),
            },
            replicas: status.replicas.into_iter().map(ReplicaReport::decode).collect(),
            replica: status.replica.map(ReplicaReport::decode),
            history: HistoryEpoch(history),
            ..Self::default()
        }
    }
}

impl ReplicaReport {
    fn encode(self) -> v1::ReplicaInfo {
        let Self { client, id, partial, source, state, lag_entries, lag } = self;
        let lag_ms = lag.map(|lag| u64::try_from(lag.as_millis()).unwrap_or(u64::MAX));
        v1::ReplicaInfo { client, id, partial, lag_entries, lag_ms, source, state }
    }

    fn decode(info: v1::ReplicaInfo) -> Self {
        let v1::ReplicaInfo { client, id, partial, lag_entries, lag_ms, source, state } = info;
        let lag = lag_ms.map(Duration::from_millis);
        Self { client, id, partial, source, state, lag_entries, lag }
    }
}

impl FeedReport {
    fn encode(self) -> v1::FeedInfo {
        let Self { first_position, next_position, event_log_operations, .. } = self;
        let Self { event_log_bytes, event_log_failing, event_log_restarts, .. } = self;
        v1::FeedInfo {
            first_position,
            next_position,
            event_log_operations,
            event_log_bytes,
            event_log_failing,
            event_log_restarts,
        }
    }

    fn decode(info: v1::FeedInfo) -> Self {
        Self {
            first_position: info.first_position,
            next_position: info.next_position,
            event_log_operations: info.event_log_operations,
            event_log_bytes: info.event_log_bytes,
            event_log_failing: info.event_log_failing,
            event_log_restarts: info.event_log_restarts,
        }
    }
}

impl MemberReport {
    fn encode(self) -> v1::MemberInfo {
        let incarnation = self.incarnation.map(|own| own.to_string()).unwrap_or_default();
        let Self { node_id, peer, client, voter, matched, reachable, .. } = self;
        v1::MemberInfo { node_id, peer, client, voter, incarnation, matched, reachable }
    }

    fn decode(info: v1::MemberInfo) -> Self {
        let incarnation = u128::from_str_radix(&info.incarnation, 16).ok().map(Incarnation);
        let v1::MemberInfo { node_id, peer, client, voter, matched, reachable, .. } = info;
        Self { node_id, peer, client, voter, incarnation, matched, reachable, ..Self::default() }
    }
}

impl MemberList {
    /// As it is listed, of `history`.
    pub(crate) fn encode(self, history: HistoryEpoch) -> v1::MemberListResponse {
        v1::MemberListResponse {
            leader: self.leader.map(encode_leader),
            position: self.position.map(|at| encode_position(at, history)),
            joint: self.joint.unwrap_or_default(),
            members: self.members.into_iter().map(MemberReport::encode).collect(),
        }
    }

    /// As it is after a change.
    pub(crate) fn encode_changed(self, history: HistoryEpoch) -> v1::MemberChangeResponse {
        let (unchanged, joint) = (self.unchanged, self.joint);
        let v1::MemberListResponse { members, position, .. } = self.encode(history);
        v1::MemberChangeResponse { members, position, unchanged, joint }
    }

    /// As another node has listed it.
    pub(crate) fn decode(list: v1::MemberListResponse) -> Self {
        Self {
            members: list.members.into_iter().map(MemberReport::decode).collect(),
            leader: list.leader.map(decode_leader),
            position: list.position.map(decode_position),
            joint: Some(list.joint),
            ..Self::default()
        }
    }

    /// As another node has told it after a change, which is in it.
    pub(crate) fn decode_changed(changed: v1::MemberChangeResponse) -> Self {
        let v1::MemberChangeResponse { members, position, unchanged, joint } = changed;
        let list = Self::decode(v1::MemberListResponse { members, position, ..Default::default() });
        // Nodes of before say it only where members are listed.
        Self { unchanged, joint, changed_at: list.position, ..list }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Leader;

    #[test]
    fn what_crosses_the_wire_arrives_as_it_was() {
        let at = |index| Some(LogId::new(3, index));
        let member = MemberReport {
            node_id: 2,
            peer: "p:1".to_owned(),
            client: "c:1".to_owned(),
            voter: true,
            incarnation: Some(Incarnation(9)),
            matched: Some(5),
            reachable: Some(true),
            ..Default::default()
        };
        let replica = |lag| ReplicaReport {
            client: "r:1".to_owned(),
            id: "r".to_owned(),
            partial: true,
            source: "s:1".to_owned(),
            state: "Synced".to_owned(),
            lag_entries: 3,
            lag,
        };
        let told = NodeReport {
            node_id: 1,
            cluster: "c".to_owned(),
            client: "here:1".to_owned(),
            role: Some(Role::Learner),
            term: 3,
            leader: Some(Leader { node_id: 2, client: "c:1".to_owned() }),
            ready: true,
            fatal: Some("fsync".to_owned()),
            diverged: Some("differs".to_owned()),
            offsets: Offsets {
                last_log: Some(9),
                committed: at(8),
                applied: at(7),
                snapshot: at(6),
                purged: at(5),
            },
            state_hash: Some(7),
            state: StateSize {
                bytes: Some(1),
                quota_bytes: Some(2),
                quota_source: Some(QuotaSource::Operator),
            },
            disk: Some(DiskStatus {
                state: DiskState::Full,
                available_bytes: Some(5),
                reserve_bytes: Some(6),
                needed_bytes: Some(7),
                ..Default::default()
            }),
            feed: Some(FeedReport {
                first_position: 3,
                next_position: 8,
                event_log_operations: 4,
                event_log_bytes: 5,
                event_log_failing: true,
                event_log_restarts: 6,
            }),
            sessions: SessionsReport { open: 4, bytes: 5, largest_opener: None },
            members: vec![member.clone()],
            replicas: vec![replica(None)],
            replica: Some(replica(Some(Duration::from_millis(7)))),
            history: HistoryEpoch(0xabc),
            version: "1".to_owned(),
            ..Default::default()
        };
        for report in [told.clone(), NodeReport::default()] {
            assert_eq!(NodeReport::decode(report.clone().encode()), report);
        }
        let list =
            MemberList { members: vec![member], leader: told.leader, position: at(4), ..Default::default() };
        for joint in [false, true] {
            let listed = MemberList { joint: Some(joint), ..list.clone() };
            assert_eq!(MemberList::decode(listed.clone().encode(HistoryEpoch(1))), listed);
            let changed = MemberList { unchanged: !joint, leader: None, changed_at: at(4), ..listed };
            assert_eq!(MemberList::decode_changed(changed.clone().encode_changed(HistoryEpoch(1))), changed);
            assert!(!changed.is_behind() && !list.is_behind());
            assert!(
                MemberList { position: at(3), ..changed.clone() }.is_behind(),
                "it is of before the change"
            );
            assert!(MemberList { position: None, ..changed }.is_behind());
        }
    }

    #[test]
    fn what_is_not_told_is_not_called_none() {
        let told = NodeReport::decode(v1::StatusResponse {
            members: vec![v1::MemberInfo::default()],
            ..Default::default()
        });
        assert_eq!((told.joint, told.in_flight, told.carried), (None, None, None));
        assert_eq!((told.sessions.largest_opener, told.members[0].carried), (None, None));
        // As a node answers that does not know the field yet.
        let changed = v1::MemberChangeResponse { unchanged: true, ..Default::default() };
        assert_eq!(MemberList::decode_changed(changed).joint, None);
    }

    #[test]
    fn what_a_newer_node_calls_by_new_names_is_not_known() {
        let status = v1::StatusResponse {
            role: "witness".to_owned(),
            disk: "melting".to_owned(),
            ..Default::default()
        };
        let report = NodeReport::decode(status);
        assert_eq!((report.role, report.disk), (None, None));
        let ready = NodeReport { ready: true, ..report };
        assert!(!ready.healthy(), "what is not understood is not taken for well");
        assert_eq!(ready.clone().encode().disk, "melting");
        assert!(NodeReport { unknown_disk: None, ..ready }.healthy(), "a node without a disk");
    }
}
