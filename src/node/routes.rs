//! What is behind the client port once there is a node.

use std::marker::PhantomData;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio::sync::watch;
use tonic::service::Routes;

use super::admin::AdminService;
use super::frames::FramesGate;
use super::metrics::NodeCollector;
use super::operated::OperatedNode;
use super::settings::{LogLevel, NodeSettings};
use super::subscriptions::{self, SubscriberCollector, Subscribers, SubscriptionService};
use super::{ADMIN, HEALTH, Services, StatusPart, http};
use crate::door::limits::DoorLimits;
use crate::door::methods::Methods;
use crate::door::metrics::DoorMetrics;
use crate::door::{Answerer, Door, Guest, services};
use crate::proto::DESCRIPTORS;
use crate::proto::replication::replication_service_server::ReplicationServiceServer;
use crate::proto::v1::admin_server::AdminServer;

/// What is served once there is a node, as far as it is known before.
pub(super) struct NodeRoutes<G: Guest, N> {
    pub(super) collectors: Vec<Box<dyn Collector>>,
    pub(super) log_level: Option<LogLevel>,
    pub(super) fixed_settings: Vec<(&'static str, Value)>,
    pub(super) status: Vec<(&'static str, StatusPart)>,
    pub(super) services: Services<N>,
    pub(super) limits: Arc<DoorLimits>,
    pub(super) methods: Methods,
    pub(super) draining: watch::Receiver<bool>,
    pub(super) frames: Arc<FramesGate<N>>,
    pub(super) guest: PhantomData<fn() -> G>,
}

impl<G: Guest, N: OperatedNode<Machine = G::Machine>> NodeRoutes<G, N> {
    /// The routes to `node`, and what counts the calls on them.
    pub(super) fn of(self, node: &N) -> (Routes, Arc<DoorMetrics>) {
        let Self { mut collectors, limits, draining, .. } = self;
        let subscribers = Subscribers::default();
        collectors.push(Box::new(NodeCollector(node.clone())));
        collectors
            .push(Box::new(SubscriberCollector { node: node.clone(), subscribers: subscribers.clone() }));
        let settings = NodeSettings::new(node.clone(), self.log_level, self.fixed_settings);
        let mut registry = Registry::default();
        let metrics = Arc::new(DoorMetrics::new(self.methods, &mut registry));
        collectors.into_iter().for_each(|collector| registry.register_collector(collector));
        let registry = Arc::new(registry);
        let (followers, settings_now) = (subscribers.clone(), settings.clone());
        let pages = http::Pages { settings: settings_now, status: self.status, registry, followers };
        let routes = Routes::from(http::router(node, pages, draining.clone()));
        let by = Answerer::of(node);
        let door =
            Door { node: node.clone(), by, metrics: metrics.clone(), limits, draining, is_relayed: false };
        let followers = subscribers.clone();
        let subscriptions = SubscriptionService { door: door.clone(), subscribers };
        self.frames.open(subscriptions.clone());
        let subscriptions = ReplicationServiceServer::new(subscriptions)
            .max_encoding_message_size(subscriptions::MAX_ENTRY_BYTES);
        let routes = routes.add_service(subscriptions);
        (add_services::<G, N>(routes, door, (settings, followers), self.services), metrics)
    }
}

fn add_services<G: Guest, N: OperatedNode<Machine = G::Machine>>(
    routes: Routes,
    door: Door<N>,
    (settings, followers): (NodeSettings<N>, Subscribers),
    own: Services<N>,
) -> Routes {
    let admin = AdminServer::new(AdminService {
        node: door.node.clone(),
        by: door.by.clone(),
        settings,
        followers,
        metrics: door.metrics.clone(),
    });
    let Services { names, add, .. } = own;
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        // The descriptors also hold the protocol between peers, which this port does not serve.
        let served = names.iter().copied().chain(services::NAMES).chain([ADMIN, subscriptions::NAME, HEALTH]);
        served.fold(builder, |builder, name| builder.with_service_name(name))
    };
    const VALID: &str = "invariant: descriptors compiled into this binary are valid";
    let routes = routes
        .add_service(admin)
        .add_service(reflection().build_v1().expect(VALID))
        .add_service(reflection().build_v1alpha().expect(VALID));
    let routes = services::add::<G, N>(&door, routes);
    add(door, routes).prepare()
}
