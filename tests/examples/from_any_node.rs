//! What the guide says of calls from any node.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::time::Duration;

use quorate::{Engine, EngineConfig};

use crate::counter::Counter;

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_carried_out_whichever_node_is_asked() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let mut listeners = BTreeMap::new();
    for id in 1..=3 {
        listeners.insert(id, TcpListener::bind("127.0.0.1:0")?);
    }
    let address = |listener: &TcpListener| listener.local_addr().unwrap().to_string();
    let peers: BTreeMap<_, _> = listeners.iter().map(|(id, listener)| (*id, address(listener))).collect();
    let mut nodes = Vec::new();
    for (id, listener) in listeners {
        let mut config = EngineConfig::new(id, dir.path().join(id.to_string()), address(&listener));
        (config.peer_listener, config.initial_members) = (Some(listener), peers.clone());
        nodes.push(Engine::open(config, Counter::default()).await?);
    }
    for node in &nodes {
        assert!(node.ready(Duration::from_secs(30)).await, "no leader");
    }
    let (node, command, mut sum) = (&nodes[0], 7, 0);

    let written = node.write_anywhere(command).await?;
    sum += command;
    assert_eq!(written.reply, sum);

    let anywhere = node.anywhere(); // or node.anywhere().within(patience): ten seconds if nothing is said
    let session = anywhere.open_session(Duration::ZERO).await?;
    let ticket = session.begin().ok_or("the window is full")?;
    let written = anywhere.write_in(&ticket, command).await?;
    let list = anywhere.remove_member(3, false).await?;

    assert_eq!(written.reply, sum + command);
    assert_eq!(list.members.iter().map(|member| member.node_id).collect::<Vec<_>>(), [1, 2]);
    let again = nodes[1].anywhere().write_in(&ticket, command).await?;
    assert_eq!((again.reply, again.log_id), (written.reply, written.log_id), "it was applied once");
    Ok(())
}
