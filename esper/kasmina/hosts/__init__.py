"""Hosts: the networks that grow."""

from __future__ import annotations

from esper.kasmina.hosts.base import BatchNorm, DataShape, Host, KeyedDropout, SlotPlace, count_parameters
from esper.kasmina.hosts.cnn import ConvHost
from esper.kasmina.hosts.transformer import Decoder
from esper.leyline.host_specs import CnnHost, HostSpec, TransformerHost

__all__ = ["BatchNorm", "DataShape", "Host", "KeyedDropout", "SlotPlace", "build_host", "count_parameters"]


def build_host(spec: HostSpec, shape: DataShape) -> Host:
    """Return a freshly initialised host for data of that shape.

    Raises:
        SpecError: The host's pooling leaves nothing of images that small.
    """
    if isinstance(spec, CnnHost):
        return ConvHost(spec, shape)
    if isinstance(spec, TransformerHost):
        return Decoder(spec, shape)
    # torchvision takes seconds to import, and only these hosts need it
    from esper.kasmina.hosts.resnet import ResNet

    return ResNet(spec, shape)
